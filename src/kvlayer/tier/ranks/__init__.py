"""The processes of one engine as one."""
