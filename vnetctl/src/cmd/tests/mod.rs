//! Commands as users type them, against a controlplane that answers from a script.

mod answers;
mod history;
mod lists;
pub(crate) mod scripted;

use std::ffi::OsString;

use vnet_proto::v1;

use self::scripted::Scripted;
use super::Context;
use crate::cli;
use crate::failure::Failure;
use crate::output::Format;
use crate::output::testing::output;

/// Runs a command line; gives what was printed.
async fn run(server: &Scripted, format: Format, words: &[&str]) -> Result<String, Failure> {
    let (printed, result) = run_all(server, format, words).await;
    result.map(|()| printed)
}

/// The same, when what was printed before a failure matters.
async fn run_all(server: &Scripted, format: Format, words: &[&str]) -> (String, Result<(), Failure>) {
    let (output, printed) = output(format);
    let context = Context {
        connection: server.connection(),
        output,
    };
    let words: Vec<OsString> = std::iter::once("vnetctl")
        .chain(words.iter().copied())
        .map(Into::into)
        .collect();
    let result = cli::run_client_command(words, context).await;
    (printed.text(), result)
}

fn tcp(prefix: &str, port: u32) -> Option<v1::Target> {
    Some(v1::Target {
        kind: Some(v1::target::Kind::Address(v1::AddressTarget {
            protocol: v1::Protocol::Tcp.into(),
            prefix: prefix.to_owned(),
            ports: Some(v1::PortRange {
                first: port,
                last: port,
            }),
        })),
    })
}

fn domain(name: &str) -> Option<v1::Target> {
    Some(v1::Target {
        kind: Some(v1::target::Kind::Name(v1::NameTarget {
            name: name.to_owned(),
            ports: None,
            lookup_only: false,
        })),
    })
}

fn named(name: &str) -> Option<v1::VmSelector> {
    Some(v1::VmSelector {
        name: name.to_owned(),
        ..Default::default()
    })
}

fn until_vm_stops() -> Option<v1::Lifetime> {
    Some(v1::Lifetime {
        kind: Some(v1::lifetime::Kind::UntilVmStops(true)),
    })
}
