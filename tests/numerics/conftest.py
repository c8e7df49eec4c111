import pytest
import torch


@pytest.fixture(autouse=True, scope="module")  # before the runs that a module shares
def one_thread():
    """The same reduction order in every process, so that bit-identity is a fair demand."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
