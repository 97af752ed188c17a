"""What runs before anything heavy is imported; only the standard library, so that `import relay_hf` stays quick."""
