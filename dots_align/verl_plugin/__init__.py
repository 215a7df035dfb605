"""dots_align inside verl's Ray trainer: what is needed beyond one launch, over Ray, is verl's; model, engine, rollouts
and rewards are the embedded loop's own.

`launch` writes the configuration that a recipe amounts to (`mapping`) and starts verl's trainer. There, `loading` is
what verl loads first, in every process, and `config`, `engine`, `rollout`, `agent_loop`, `reward`, `data` and `publish`
are named in that configuration.
"""
