"""HTTP servers of the environments that need one."""
