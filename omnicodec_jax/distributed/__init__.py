"""How arrays and processes are spread over devices and hosts."""
