"""``python -m chatterbox_deploy``."""

from chatterbox_deploy.cli import main

if __name__ == "__main__":
    main(prog_name="chatterbox-deploy")
