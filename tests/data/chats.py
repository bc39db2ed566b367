"""Messages and conversations for tests."""


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


HELLO = [user("Hi."), assistant("Hello.")]
FOUR = [system("Be brief."), user("Hi."), assistant("Hello."), user("Bye."), assistant("Bye, bye.")]
BIRDS = {"prompt": [user("Which bird?")], "chosen": [assistant("A duck.")], "rejected": [assistant("A goose.")]}


def numbered(count, start=0):
    """Return rows of so many conversations."""
    return [{"messages": [user(f"What is {i}?"), assistant(f"It is {i}.")]} for i in range(start, start + count)]
