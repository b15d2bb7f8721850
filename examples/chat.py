"""A conversation that the model's chat template renders. The template is read from the deployed model's folder."""

from flightline.client import Client

QUESTIONS = ("Name a planet.", "Is it larger than the Earth?")

with Client() as llm:
    messages = [{"role": "system", "content": "You answer in one short sentence."}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        print(f"you    {question}\nmodel  ", end="")
        said = ""
        for piece in llm.chat_stream(messages, max_tokens=40):
            said += str(piece)
            print(piece, end="", flush=True)
        messages.append({"role": "assistant", "content": said})
        print()
