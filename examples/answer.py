"""One answer, with its token counts and the server's own times."""

from flightline.client import Client, ClientError

try:
    with Client() as llm:
        answer = llm.generate("The capital of France is", max_tokens=16)
except ClientError as error:
    raise SystemExit(f"error: {error}") from None

print(answer.text)
print(f"{answer.num_input_tokens} tokens in, {answer.num_output_tokens} out, ended by {answer.finish_reason}")
times = answer.perf_metrics
if times is not None:
    print(f"first token after {1000 * times.ttft_s:.0f} ms, all after {times.total_s:.2f} s")
