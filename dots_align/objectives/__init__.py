"""Pure maths of the RL objective, over verl's registered estimators and losses."""
