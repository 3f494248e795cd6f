from __future__ import annotations
def find_stacks(model, call, args, kwargs, groups):
    return {}
