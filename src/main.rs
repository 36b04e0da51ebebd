//! The `cowdisk` command.

fn main() -> std::process::ExitCode {
    cowdisk::cli::main()
}
