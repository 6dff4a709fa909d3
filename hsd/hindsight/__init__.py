"""The method as pure functions: scored rollouts of a group -> what the teacher reads."""
