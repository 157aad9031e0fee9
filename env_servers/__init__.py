"""HTTP servers behind the environments that need one."""
