"""A terminal assistant: a conversation with memory. Ctrl-C stops an answer, Ctrl-D ends.

python examples/assistant.py [MODEL]
"""

from __future__ import annotations

import sys

import minflash

SYSTEM = {"role": "system", "content": "You are a helpful assistant. Answer in a few sentences."}


def answer(llm: minflash.LLM, messages: list[dict[str, str]]) -> str:
    """Prints the answer while it is made, and returns it."""
    said = ""
    stream = llm.stream(messages, max_tokens=200)
    try:
        for chunk in stream:
            print(chunk.text, end="", flush=True)
            said += chunk.text
    except KeyboardInterrupt:
        said += " ..."
    finally:
        stream.close()  # after Ctrl-C the model is ready for the next prompt
    print()
    return said


def main() -> None:
    with minflash.load(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
        messages = [SYSTEM]
        while True:
            try:
                question = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if not question:
                continue
            messages.append({"role": "user", "content": question})
            try:
                said = answer(llm, messages)
            except minflash.ContextError as error:
                print(f"the conversation is too long, starting anew: {error}", file=sys.stderr)
                messages = [SYSTEM]
                continue
            messages.append({"role": "assistant", "content": said})


if __name__ == "__main__":
    main()
