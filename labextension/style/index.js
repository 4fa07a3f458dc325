import './base.css';
import './happened.css';
import './actions.css';
