import { LabIcon } from '@jupyterlab/ui-components';

import sliceSvg from '../style/icons/slice.svg';
import warningSvg from '../style/icons/warning.svg';

export const sliceIcon = new LabIcon({ name: 'nbgpu:slice', svgstr: sliceSvg });
export const warningIcon = new LabIcon({
  name: 'nbgpu:warning',
  svgstr: warningSvg
});
