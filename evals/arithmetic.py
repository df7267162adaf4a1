"""python -m evals.arithmetic ckpt=DIR [data.path=] [split=test] [limit=] [batch_size=]"""

from simcot_latent.evaluate import run

if __name__ == "__main__":
    run("arithmetic")
