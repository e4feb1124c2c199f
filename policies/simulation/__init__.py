"""Thousands of rollouts at once, over synthetic sessions, by the rules that decide a real one.

`plan` puts a policy into arrays, `world` says what is true and draws sessions, `cells` hold the evidence,
`fleet` walks the steps of `decide` for all rollouts together, `naive` judges the same sessions by
thresholds, `study` runs a scenario and counts who was wrong. A test holds `fleet` and `decide` together,
decision for decision. No clock and no randomness of its own: a seed comes in.
"""
