import { fieldsOf, sizeAsked, withShare } from '../../../labextension/src/size';
import { answer, GIB } from './usage';

const [device] = answer(0).devices;
device.compute_limit_milli = 332;
device.memory_limit_bytes = 20 * GIB + 1;
const had = fieldsOf(device);

test('the form begins with what the slice has, and asks for nothing as it stands', () => {
  expect(had).toEqual({ share: '33.2 %', memory: '20 GiB' });
  expect(sizeAsked(had, had)).toBeNull();
  expect(sizeAsked({ ...had, share: '' }, had)).toBeNull();
});

test('what was not touched is not asked for', () => {
  expect(sizeAsked({ ...had, memory: ' 10 GiB ' }, had)).toEqual({
    gpu_memory: '10 GiB'
  });
  expect(sizeAsked({ share: '1/2', memory: '10 GiB' }, had)).toEqual({
    gpu_fraction: '1/2',
    gpu_memory: '10 GiB'
  });
});

test('memory follows another share until somebody writes it', () => {
  const other = withShare(had, '1/2', had);
  expect(other).toEqual({ share: '1/2', memory: '' });
  expect(sizeAsked(other, had)).toEqual({ gpu_fraction: '1/2' });
  expect(sizeAsked({ ...had, memory: '' }, had)).toEqual({
    gpu_fraction: '33.2 %'
  });
  const written = withShare({ ...had, memory: '10 GiB' }, '1/2', had);
  expect(written.memory).toBe('10 GiB');
  const kept = { share: '1/2', memory: had.memory };
  expect(sizeAsked(kept, had)).toEqual({
    gpu_fraction: '1/2',
    gpu_memory: '20 GiB'
  });
});
