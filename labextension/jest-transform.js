// TypeScript to CommonJS for jest, types dropped; tsc checks them. Less to install than a transformer package.
const ts = require('typescript');

module.exports = {
  process(source, path) {
    const { outputText } = ts.transpileModule(source, {
      fileName: path,
      compilerOptions: {
        module: 'commonjs',
        target: 'ES2020',
        jsx: 'react',
        esModuleInterop: true,
        inlineSourceMap: true
      }
    });
    return { code: outputText };
  }
};
