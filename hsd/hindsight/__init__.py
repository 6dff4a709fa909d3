"""The method as pure functions: scored rollouts of a group -> the teacher's prompts."""
