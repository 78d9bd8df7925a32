"""What a prompt's tokens are, which of them a method computes, and the plan that says so to the device."""
