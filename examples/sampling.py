"""Three different answers to one prompt, repeatable by a seed, with the likeliest alternatives of each first token."""

from flightline.client import Client, GenerateParams

params = GenerateParams(
    max_tokens=12,
    temperature=0.9,
    top_p=0.95,
    seed=7,
    num_return_sequences=3,
    top_logprobs=3,
    return_token_ids=True,
)
with Client() as llm:
    for answer in llm.generate_all("My favourite colour is", params):
        print(repr(answer.text))
        print(f"    token {answer.token_ids[0]}; the likeliest there: {answer.top_log_probs[0]}")
