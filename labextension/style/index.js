import './base.css';
import './happened.css';
import './actions.css';
import '../nbgpu_lab/monitor/monitor.css';
