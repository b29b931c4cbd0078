"""The `ultrarec` command, the TorchX component behind `ultrarec launch`, and the check of an installation."""
