"""``minillm diagnose``: how noisy, how biased and how large the gradient of each choice of credit is, on your own pair.

``names`` says what can be compared, ``scores`` differentiates along random directions, ``gradients`` draws the text and
makes one small vector of each prompt and choice, ``measure`` turns those into variances, biases and advice, ``words``
prints.
"""
