"""A desktop window: the model works in a thread, and the window stays alive.

python examples/window.py [MODEL]      (needs tkinter: apt install python3-tk)
"""

from __future__ import annotations

import queue
import sys
import threading
import tkinter as tk
from tkinter.scrolledtext import ScrolledText

import minflash


class Window:
    """Text that arrives from the thread goes through a queue: tkinter has one thread of its own."""

    def __init__(self, root: tk.Tk, llm: minflash.LLM) -> None:
        self.root, self.llm = root, llm
        self.arrived: queue.Queue[str | None] = queue.Queue()  # None: the answer is complete
        root.title(f"minflash ({llm.device})")
        self.text = ScrolledText(root, wrap="word", height=20, width=80)
        self.text.pack(fill="both", expand=True)
        self.entry = tk.Entry(root)
        self.entry.pack(side="left", fill="x", expand=True)
        self.entry.bind("<Return>", lambda event: self.ask())
        self.button = tk.Button(root, text="Stop", command=llm.cancel, state="disabled")
        self.button.pack(side="right")
        self.entry.focus()
        self.poll()

    def ask(self) -> None:
        question = self.entry.get().strip()
        if not question or self.button["state"] == "normal":  # one answer at a time
            return
        self.entry.delete(0, "end")
        self.text.insert("end", f"> {question}\n")
        self.button["state"] = "normal"
        threading.Thread(target=self.work, args=(question,), daemon=True).start()

    def work(self, question: str) -> None:
        try:
            prompt = [{"role": "user", "content": question}]
            for chunk in self.llm.stream(prompt, max_tokens=200):
                self.arrived.put(chunk.text)
        except minflash.MinflashError as error:
            self.arrived.put(f"[{error}]")
        finally:
            self.arrived.put(None)

    def poll(self) -> None:
        while not self.arrived.empty():
            text = self.arrived.get()
            self.text.insert("end", "\n\n" if text is None else text)
            self.text.see("end")
            if text is None:
                self.button["state"] = "disabled"
        self.root.after(20, self.poll)


def main() -> None:
    with minflash.load(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
        root = tk.Tk()
        Window(root, llm)
        root.mainloop()
        llm.cancel()


if __name__ == "__main__":
    main()
