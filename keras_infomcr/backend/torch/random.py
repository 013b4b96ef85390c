"""torch: random numbers, which unseeded layers draw from generators of the process."""

import torch


def random_state() -> list[torch.Tensor]:
    """Return the states of the generators that unseeded `Dropout` layers draw from."""
    states = [torch.get_rng_state()]
    # A process that has not used its GPU would begin to, were it asked for this state.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def set_random_state(state: list[torch.Tensor]) -> None:
    """Set the states of these generators."""
    torch.set_rng_state(state[0])
    for cuda in state[1:]:
        torch.cuda.set_rng_state(cuda)
