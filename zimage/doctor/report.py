def examine_machine(*, as_json: bool) -> bool:
    return True
