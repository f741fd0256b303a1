# Completion of etcdfs for fish; the command itself says what fits.
function __etcdfs_complete
    env _ETCDFS_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=$argv[1] \
        _TYPER_COMPLETE_ARGS=(commandline --current-process --cut-at-cursor | string collect) etcdfs 2>/dev/null
end
complete --command etcdfs --no-files --condition "__etcdfs_complete is-args" \
    --arguments "(__etcdfs_complete get-args)"
