def attention(arguments, static):
    raise NotImplementedError


def refusal(arguments, static):
    return "stub"
