"""The notebook side: server extension, kernel provisioner, widget."""
