"""Image data: conversion to .beton files, and loaders that read them as deterministic uint8 batches."""
