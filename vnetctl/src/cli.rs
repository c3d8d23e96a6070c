//! What a user types, as `clap` reads it, and which command each line becomes.
//!
//! Nouns hold their verbs in `cmd`; here are the daily verbs, the options that every command takes,
//! and the way from arguments to an exit code.

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::client::{Connection, Server};
use crate::cmd::answer::{AllowArgs, ApproveArgs, DenyArgs};
use crate::cmd::capture::CaptureArgs;
use crate::cmd::dataplane::DataplaneCommand;
use crate::cmd::demo::DemoArgs;
use crate::cmd::dns::DnsCommand;
use crate::cmd::events::EventsCommand;
use crate::cmd::flows::FlowsCommand;
use crate::cmd::forward::ForwardCommand;
use crate::cmd::grants::GrantsCommand;
use crate::cmd::pending::PendingCommand;
use crate::cmd::policy::PolicyCommand;
use crate::cmd::run::RunArgs;
use crate::cmd::up::UpArgs;
use crate::cmd::vm::VmCommand;
use crate::cmd::{Context, demo, run, up};
use crate::failure::{EXIT_RUN_FAILED, EXIT_USAGE, Failure};
use crate::output::{self, Format, Output};

/// A network for VMs and commands that asks before it lets anything out
#[derive(Debug, Parser)]
#[command(
    name = "vnetctl",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
#[command(subcommand_required = true, disable_help_subcommand = true, after_help = EXAMPLES)]
pub struct Cli {
    /// The controlplane, as unix:///PATH; your own if left out, started when needed
    #[arg(long, global = true, env = "VNET_SERVER", value_name = "URL", help_heading = GLOBAL)]
    pub server: Option<Server>,
    /// How data is printed [default: table]
    #[arg(short, long, global = true, value_name = "FORMAT", help_heading = GLOBAL)]
    pub output: Option<Format>,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command behind a network of its own
    Run(Box<RunArgs>),
    /// Serve VMs: a dataplane, and your controlplane if none answers
    Up(Box<UpArgs>),
    /// Tell the whole story in a minute, offline: a held request, a yes, a no, and the history
    Demo(DemoArgs),
    /// What is held and waits for an answer
    #[command(subcommand)]
    Pending(PendingCommand),
    /// Answer yes to pending requests
    #[command(
        long_about = "Answer yes to pending requests.\n\n\
            The answer holds for the VM that asked, until it stops, in the narrowest scope: name and port \
            where a name is known, else address and port. What is held and covered goes through at once.",
        after_help = "Examples:\n  vnetctl approve \"$(vnetctl pending list -o json | jq -r '.[0].id')\"\n  \
            vnetctl approve 01ab --for 1h --reason 'package upgrade'\n  vnetctl approve 01ab --scope subdomains --all-vms --forever\n  \
            vnetctl approve --vm web --matching '*.example.com'"
    )]
    Approve(ApproveArgs),
    /// Answer no to pending requests, or deny a destination
    #[command(
        long_about = "Answer no to pending requests, or deny a destination.\n\n\
            Of a request: for the VM that asked, until it stops, in the narrowest scope. Of a destination: for \
            ever, for the only VM there is or those you name. Live flows that it covers are cut.",
        after_help = "Examples:\n  vnetctl deny 01ab\n  vnetctl deny --matching '*.ads.example'\n  vnetctl deny tcp 192.0.2.7:443\n  \
            vnetctl deny domain '*.malware.example' --all-vms"
    )]
    Deny(DenyArgs),
    /// Allow a destination
    #[command(
        long_about = "Allow a destination.\n\n\
            It holds for ever, for the only VM there is or those you name, and answers the pending requests \
            that it covers.",
        after_help = "Examples:\n  vnetctl allow tcp 192.0.2.7:443\n  vnetctl allow udp 10.0.0.0/8:53 --vm web\n  \
            vnetctl allow icmp 192.0.2.7 --for 10m\n  vnetctl allow domain '*.github.com:443' --all-vms"
    )]
    Allow(AllowArgs),
    /// The answers that hold now
    #[command(subcommand)]
    Grants(GrantsCommand),
    /// The VMs, and how each is treated
    #[command(subcommand)]
    Vm(VmCommand),
    /// Write a VM's packets, live, as pcapng
    #[command(
        long_about = "Write a VM's packets, live, as pcapng.\n\n\
            From now on until it is interrupted, the VM is gone, or --count or --for is reached. Nothing is kept of \
            them elsewhere. Who takes them too slowly loses some, which are counted, and delays nobody.",
        after_help = "Examples:\n  vnetctl capture web -w web.pcapng\n  \
            vnetctl capture web --filter 'tcp port 80' -w - | tshark -r -\n  \
            vnetctl capture web --filter 'host 192.0.2.0/24 not arp' --for 10s -w - | wireshark -k -i -"
    )]
    Capture(CaptureArgs),
    /// Live connections
    #[command(subcommand)]
    Flows(FlowsCommand),
    /// What happened, live and in the history
    #[command(subcommand)]
    Events(EventsCommand),
    /// The documents that decide
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// What dataplanes have cached
    #[command(subcommand)]
    Dataplane(DataplaneCommand),
    /// Ports of the host that lead into a guest
    #[command(subcommand)]
    Forward(ForwardCommand),
    /// Local zones, what lookups taught, and what was refused
    #[command(subcommand)]
    Dns(DnsCommand),
    /// Print a shell's completion script
    #[command(after_help = "Examples:\n  source <(vnetctl completions bash)\n  \
        vnetctl completions zsh > ~/.zfunc/_vnetctl\n  vnetctl completions fish | source")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// From arguments (the program's name first) to an exit code.
pub fn main(arguments: Vec<OsString>) -> u8 {
    let is_run = command_of(&arguments).is_some_and(|(_, name)| name == "run");
    let arguments = with_two_dashes(arguments);
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let printed = output::print_parsed(&error);
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match printed {
                    // A reader that went away is no reason to complain.
                    Ok(()) | Err(Failure::OutputClosed) => 0,
                    Err(failure) => fail(if is_run { failure.in_run() } else { failure }),
                },
                _ if is_run => EXIT_RUN_FAILED,
                _ => EXIT_USAGE,
            };
        }
    };
    let result = execute(cli).map_err(|failure| if is_run { failure.in_run() } else { failure });
    match result {
        Ok(code) => code,
        Err(failure) => fail(failure),
    }
}

/// Says why, if that is still to be said, and gives the exit code.
fn fail(failure: Failure) -> u8 {
    if let Some(message) = failure.message() {
        output::say(message);
    }
    failure.exit_code()
}

/// The command of a line, and where it stands. The failures of `run` have codes of their own, and `up` has flags of
/// another form too.
fn command_of(arguments: &[OsString]) -> Option<(usize, String)> {
    let mut rest = arguments.iter().enumerate().skip(1);
    while let Some((at, argument)) = rest.next() {
        match &*argument.to_string_lossy() {
            "--server" | "--output" | "-o" => {
                rest.next();
            }
            flag if flag.starts_with('-') => {}
            command => return Some((at, command.to_owned())),
        }
    }
    None
}

/// The same line, in which the long flags of `up` may stand behind one dash, as gvproxy's do: a known name of more than
/// one letter is that flag before it is a cluster of short ones.
fn with_two_dashes(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let Some((at, _)) = command_of(&arguments).filter(|(_, name)| name == "up") else {
        return arguments;
    };
    let mut command = Cli::command();
    let Some(up) = command.find_subcommand_mut("up") else {
        return arguments;
    };
    let names: Vec<String> = up
        .get_arguments()
        .flat_map(|arg| {
            let aliases = arg.get_all_aliases().unwrap_or_default();
            arg.get_long().into_iter().chain(aliases).map(str::to_owned)
        })
        .filter(|name| name.len() > 1)
        .collect();
    for word in arguments[at + 1..].iter_mut() {
        let Some(text) = word.to_str() else { continue };
        if text == "--" {
            break;
        }
        let bare = text.strip_prefix('-').filter(|rest| !rest.starts_with('-'));
        let name = bare.map(|rest| rest.split('=').next().unwrap_or_default());
        if name.is_some_and(|name| names.iter().any(|known| known == name)) {
            *word = format!("-{text}").into();
        }
    }
    arguments
}

fn execute(cli: Cli) -> Result<u8, Failure> {
    let Cli {
        server,
        output,
        command,
    } = cli;
    let connection = Connection { named: server };
    let without_data = |name: &str| match output {
        Some(_) => Err(Failure::Usage(format!("{name} prints no data; leave -o out"))),
        None => Ok(()),
    };
    match command {
        // These start processes and read signals, so each makes its own runtime when it is ready to.
        Command::Run(args) => {
            without_data("run")?;
            run::execute(*args, connection)
        }
        Command::Up(args) => {
            without_data("up")?;
            up::execute(*args, connection).map(|()| 0)
        }
        Command::Demo(args) => {
            without_data("demo")?;
            demo::execute(args).map(|()| 0)
        }
        Command::Completions { shell } => {
            without_data("completions")?;
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "vnetctl", &mut script);
            let script = String::from_utf8_lossy(&script).into_owned();
            Output::stdout(Format::Table).write(&script).map(|()| 0)
        }
        Command::Capture(args) => {
            without_data("capture")?;
            let context = Context {
                connection,
                output: Output::stdout(Format::Table),
            };
            runtime()?
                .block_on(client_command(Command::Capture(args), context))
                .map(|()| 0)
        }
        command => {
            let context = Context {
                connection,
                output: Output::stdout(output.unwrap_or_default()),
            };
            runtime()?.block_on(client_command(command, context)).map(|()| 0)
        }
    }
}

async fn client_command(command: Command, mut context: Context) -> Result<(), Failure> {
    let context = &mut context;
    match command {
        Command::Pending(command) => command.execute(context).await,
        Command::Approve(args) => args.execute(context).await,
        Command::Deny(args) => args.execute(context).await,
        Command::Allow(args) => args.execute(context).await,
        Command::Grants(command) => command.execute(context).await,
        Command::Vm(command) => command.execute(context).await,
        Command::Capture(args) => args.execute(context).await,
        Command::Flows(command) => command.execute(context).await,
        Command::Events(command) => command.execute(context).await,
        Command::Policy(command) => command.execute(context).await,
        Command::Dataplane(command) => command.execute(context).await,
        Command::Forward(command) => command.execute(context).await,
        Command::Dns(command) => command.execute(context).await,
        // Handled by `execute`, which has no runtime yet.
        Command::Run(_) | Command::Up(_) | Command::Demo(_) | Command::Completions { .. } => Ok(()),
    }
}

/// Runs a command of a client as it would be typed, in a context of the test's own.
#[cfg(test)]
pub(crate) async fn run_client_command(words: Vec<OsString>, context: Context) -> Result<(), Failure> {
    let cli = Cli::try_parse_from(words).map_err(|e| Failure::Usage(e.to_string()))?;
    client_command(cli.command, context).await
}

/// A runtime on this thread, for a client's few calls.
///
/// # Errors
/// When the system gives none.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::Failed(format!("cannot start: {e}")))
}

const GLOBAL: &str = "Global options";

const EXAMPLES: &str = "\
Examples:
  vnetctl run --secure-mode -- curl -sS http://192.0.2.7/   # its first packet is held; answer at the prompt
  vnetctl pending list                                      # or from another terminal
  vnetctl allow domain '*.github.com:443'
  vnetctl demo

Exit codes: 0 done, 1 refused or failed, 2 usage; 3 from `policy diff` where something differs. `run` exits with its command's status, or with 125 \
(its own failure), 126 (the command cannot be executed) or 127 (it was not found).";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example_or_verbs() {
        fn check(command: &clap::Command, path: &str) {
            for sub in command.get_subcommands() {
                let path = format!("{path} {}", sub.get_name());
                assert!(
                    sub.has_subcommands() || sub.get_after_help().is_some() || path.ends_with("zones list"),
                    "{path} has no examples"
                );
                check(sub, &path);
            }
        }
        check(&Cli::command(), "vnetctl");
    }

    #[test]
    fn examples_parse() {
        fn check(command: &mut clap::Command, path: &str) {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            for line in help.lines().filter_map(|l| l.trim().strip_prefix("vnetctl ")) {
                let line = line
                    .split(" | ")
                    .next()
                    .unwrap_or_default()
                    .split("  ")
                    .next()
                    .unwrap_or_default();
                let words = format!("vnetctl {}", line.split(" > ").next().unwrap_or_default());
                let words = shell_words(&words);
                let parsed = Cli::try_parse_from(&words);
                assert!(parsed.is_ok(), "{path}: {words:?}: {}", parsed.unwrap_err());
            }
            let names: Vec<String> = command
                .get_subcommands()
                .map(|c| c.get_name().to_owned())
                .collect();
            for name in names {
                let path = format!("{path} {name}");
                check(command.find_subcommand_mut(&name).unwrap(), &path);
            }
        }
        let mut command = Cli::command();
        command.build();
        check(&mut command, "vnetctl");
    }

    /// Words as a shell would split the examples: quotes group, `$(...)` inside double quotes is one.
    fn shell_words(line: &str) -> Vec<String> {
        let mut words = vec![String::new()];
        let mut quote = None;
        for c in line.chars() {
            let word = words.last_mut().unwrap();
            match (c, quote) {
                ('\'' | '"', None) => quote = Some(c),
                (c, Some(q)) if c == q => quote = None,
                (' ', None) => words.push(String::new()),
                (c, _) => word.push(c),
            }
        }
        words
    }

    #[test]
    fn what_comes_after_two_dashes_is_the_commands() {
        let cli = parse("vnetctl run --vm a -- sh -o pipefail --vm b").unwrap();
        let Command::Run(args) = cli.command else {
            panic!("not run")
        };
        assert_eq!(args.command, ["sh", "-o", "pipefail", "--vm", "b"]);
        assert_eq!(cli.output, None);
    }

    #[test]
    fn lists_take_the_output_format_on_either_side() {
        assert_eq!(
            parse("vnetctl -o json vm list").unwrap().output,
            Some(Format::Json)
        );
        assert_eq!(
            parse("vnetctl vm list -o yaml").unwrap().output,
            Some(Format::Yaml)
        );
    }

    #[test]
    fn usage_errors_of_run_are_told_apart() {
        let words = |line: &str| line.split_whitespace().map(OsString::from).collect::<Vec<_>>();
        let names_run = |line: &str| command_of(&words(line)).is_some_and(|(_, name)| name == "run");
        assert!(names_run("vnetctl run --bogus"));
        assert!(names_run("vnetctl --server unix:///run run --bogus"));
        assert!(!names_run("vnetctl vm show run"));
        assert!(!names_run("vnetctl --server run"));
    }

    #[test]
    fn up_takes_its_long_flags_behind_one_dash_too() {
        let read = |line: &str| {
            let words = line.split_whitespace().map(OsString::from).collect();
            let words = with_two_dashes(words);
            let words: Vec<_> = words
                .iter()
                .map(|word| word.to_string_lossy().into_owned())
                .collect();
            words.join(" ")
        };
        assert_eq!(
            read(
                "vnetctl up -listen-qemu unix:///q -mtu=4000 --vm a -p 80:80 -secure-mode -gatewayIP 10.0.0.1"
            ),
            "vnetctl up --listen-qemu unix:///q --mtu=4000 --vm a -p 80:80 --secure-mode --gatewayIP 10.0.0.1"
        );
        assert_eq!(read("vnetctl up -bogus -- -mtu"), "vnetctl up -bogus -- -mtu");
        assert_eq!(read("vnetctl vm list -mtu"), "vnetctl vm list -mtu");
        let line = "vnetctl up -listen-qemu unix:///q -deviceIP 192.168.127.9 -hostIP 192.168.127.253";
        let words = with_two_dashes(line.split_whitespace().map(OsString::from).collect());
        let Command::Up(args) = Cli::try_parse_from(words).unwrap().command else {
            panic!("not up")
        };
        assert_eq!(args.dataplane.first_guest.as_deref(), Some("192.168.127.9"));
        assert_eq!(args.dataplane.host_alias.as_deref(), Some("192.168.127.253"));
    }

    #[test]
    fn commands_of_later_issues_are_not_listed() {
        assert!(parse("vnetctl top").is_err());
    }
}
