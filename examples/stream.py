"""A streamed answer, left in the middle: the server frees its place at once."""

from contextlib import closing

from flightline.client import Client

# closing(): whoever leaves the loop early, by an exception too, ends the request.
with Client() as llm, closing(llm.generate_stream("Once upon a time", max_tokens=200)) as stream:
    sentences = 0
    for piece in stream:
        print(piece, end="", flush=True)
        sentences += str(piece).count(".")
        if sentences >= 2:
            break
print()
