"""What an installation needs besides the program: systemd units and examples of their configuration."""
