"""python -m evals.gsm8k_aug ckpt=DIR [data.path=] [split=test] [limit=] [batch_size=]"""

from simcot_latent.evaluate import run

if __name__ == "__main__":
    run("gsm8k_aug")
