"""The counting device needs a torch whose backends can be written in Python (2.10 or later)."""

from torch.utils import backend_registration

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    collect_ignore_glob = ["test_*.py"]
