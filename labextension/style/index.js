import './base.css';
import './happened.css';
