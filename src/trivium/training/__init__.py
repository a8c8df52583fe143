"""The machine: device, optimizers, the step, the loop, checkpoints and rollouts."""
