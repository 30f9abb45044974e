"""What all services share: the wire format, schemas, chat formatting, templates, errors, health and logging.

It imports no service, and torch only in `shared.tensors`.
"""
