"""Runs the functions of the handler's team: conversion, threads, `check`, `workflow_id`, plain operations."""
