// Bundles lib/widget.js and what it needs into the one module that anywidget loads.
import { rspack } from '@rspack/core';
import { fileURLToPath } from 'node:url';

const compiler = rspack({
  mode: 'production',
  context: fileURLToPath(new URL('.', import.meta.url)),
  entry: './lib/widget.js',
  devtool: false,
  experiments: { outputModule: true },
  output: {
    path: fileURLToPath(new URL('nbgpu_lab/monitor', import.meta.url)),
    filename: 'monitor.js',
    module: true,
    library: { type: 'module' }
  },
  performance: { hints: false }
});

compiler.run((error, stats) => {
  if (error || stats.hasErrors()) {
    console.error(error ?? stats.toString({ colors: false }));
    process.exitCode = 1;
  }
  compiler.close(() => {});
});
