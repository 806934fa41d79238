"""Many task vectors become one."""
