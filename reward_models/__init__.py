"""What is good: reward functions that a recipe names as `reward_models.<file>:<function>`."""
