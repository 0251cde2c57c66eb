"""Generated from protos/paceline/v1 by `make stubs`; do not edit."""
