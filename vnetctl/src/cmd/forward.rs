//! `forward list|add|remove`: ports of the host that lead into a guest.

use std::net::IpAddr;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use vnet_proto::v1;

use super::Context;
use super::select::vm_name;
use crate::client::{Client, unary};
use crate::failure::Failure;
use crate::launch::ForwardSpec;
use crate::output::{Row, words};

/// Verbs of `forward`.
#[derive(Debug, Subcommand)]
pub enum ForwardCommand {
    /// List forwards
    #[command(after_help = "Examples:\n  vnetctl forward list\n  vnetctl forward list -o json")]
    List(ListArgs),
    /// Open a port of the host that leads into a guest
    #[command(after_help = "Examples:\n  vnetctl forward add 8080:80 --vm web\n  \
        vnetctl forward add 127.0.0.1:5353:192.168.127.2:53/udp\n  vnetctl forward add 0:22 --vm web   # any free port")]
    Add(AddArgs),
    /// Close a forward, and cut its flows
    #[command(
        after_help = "Examples:\n  vnetctl forward remove 127.0.0.1:8080\n  vnetctl forward remove 127.0.0.1:5353/udp"
    )]
    Remove(RemoveArgs),
}

/// Arguments of `forward list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only this network's
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<String>,
}

/// Arguments of `forward add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    /// `[ADDRESS:]PORT:[GUEST:]PORT[/tcp|/udp]`; without an address it listens on 127.0.0.1
    #[arg(value_name = "FORWARD")]
    pub forward: ForwardSpec,
    /// The VM it leads into, where FORWARD names no guest address
    #[arg(long, value_name = "NAME", value_parser = vm_name)]
    pub vm: Option<String>,
    /// The network; may be left out where there is only one
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<String>,
}

/// Arguments of `forward remove`.
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// Where it listens, as 127.0.0.1:8080 or 127.0.0.1:5353/udp
    #[arg(value_name = "ADDRESS:PORT[/tcp|/udp]", value_parser = listen)]
    pub listen: (v1::Protocol, std::net::SocketAddr),
    /// The network; may be left out where there is only one
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<String>,
}

impl ForwardCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        let client = context.connection.open().await?;
        match self {
            Self::List(ListArgs { network }) => {
                let request = v1::ListForwardsRequest {
                    network: network.unwrap_or_default(),
                };
                let answer = client
                    .forwards()
                    .list_forwards(unary(request))
                    .await?
                    .into_inner();
                context.output.list(&answer.forwards)
            }
            Self::Add(AddArgs { forward, vm, network }) => {
                let (network, guest) = match forward.guest {
                    Some(guest) => (network, guest),
                    None => {
                        let (home, guest) = guest_address(&client, vm).await?;
                        (network.or(Some(home)), guest)
                    }
                };
                let made = forward.into_forward(guest);
                let forward = v1::Forward {
                    network: network.unwrap_or_default(),
                    protocol: v1::Protocol::from(made.protocol).into(),
                    listen: made.listen.to_string(),
                    target: made.target.to_string(),
                };
                let request = v1::CreateForwardRequest {
                    forward: Some(forward),
                };
                let answer = client
                    .forwards()
                    .create_forward(unary(request))
                    .await?
                    .into_inner();
                context.output.done("vnet.v1.CreateForwardResponse", &answer, || {
                    format!("opened {}", sentence(answer.forward.as_ref()))
                })
            }
            Self::Remove(RemoveArgs {
                listen: (protocol, listen),
                network,
            }) => {
                let request = v1::DeleteForwardRequest {
                    network: network.unwrap_or_default(),
                    protocol: protocol.into(),
                    listen: listen.to_string(),
                };
                let answer = client
                    .forwards()
                    .delete_forward(unary(request))
                    .await?
                    .into_inner();
                context.output.done("vnet.v1.DeleteForwardResponse", &answer, || {
                    let cut = words::cut(answer.cut.as_ref());
                    format!("closed {}{cut}", sentence(answer.forward.as_ref()))
                })
            }
        }
    }
}

/// The network and address of the VM named, or of the only one there is.
async fn guest_address(client: &Client, name: Option<String>) -> Result<(String, IpAddr), Failure> {
    let vm = match name {
        Some(name) => client
            .vms()
            .get_vm(unary(v1::GetVmRequest { name }))
            .await?
            .into_inner()
            .vm
            .unwrap_or_default(),
        None => {
            let mut vms = client
                .vms()
                .list_vms(unary(v1::ListVmsRequest::default()))
                .await?
                .into_inner()
                .vms;
            match (vms.len(), vms.pop()) {
                (1, Some(vm)) => vm,
                (count, _) => {
                    return Err(Failure::Failed(format!(
                        "the forward names no guest address, and there are {count} VMs \
                         (name one with --vm NAME, or write the address as 8080:192.168.127.2:80)"
                    )));
                }
            }
        }
    };
    let address = vm.addresses.iter().find_map(|a| a.parse().ok()).ok_or_else(|| {
        Failure::Failed(format!(
            "{} has no address yet; try again when it has asked for one, or write the guest's address as 8080:192.168.127.2:80",
            crate::output::text::safe(&vm.name)
        ))
    })?;
    Ok((vm.network, address))
}

impl Row for v1::Forward {
    const NAME: &'static str = "vnet.v1.Forward";
    const COLUMNS: &'static [&'static str] = &["NETWORK", "PROTOCOL", "LISTEN", "TARGET"];

    fn cells(&self, _: SystemTime) -> Vec<String> {
        vec![
            self.network.clone(),
            words::protocol(self.protocol),
            self.listen.clone(),
            self.target.clone(),
        ]
    }
}

fn sentence(forward: Option<&v1::Forward>) -> String {
    let forward = forward.cloned().unwrap_or_default();
    format!(
        "{} {} -> {}",
        words::protocol(forward.protocol),
        forward.listen,
        forward.target
    )
}

fn listen(text: &str) -> Result<(v1::Protocol, std::net::SocketAddr), String> {
    let (address, protocol) = match text.rsplit_once('/') {
        Some((address, "udp")) => (address, v1::Protocol::Udp),
        Some((address, "tcp")) => (address, v1::Protocol::Tcp),
        _ => (text, v1::Protocol::Tcp),
    };
    let address = address.parse().map_err(|_| {
        format!("{text:?} is not where a forward listens (expected one as 127.0.0.1:8080 or [::1]:53/udp)")
    })?;
    Ok((protocol, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_forward_listens_is_an_address_and_a_port() {
        let (protocol, address) = listen("[::1]:53/udp").unwrap();
        assert_eq!(
            (protocol, address.to_string()),
            (v1::Protocol::Udp, "[::1]:53".to_owned())
        );
        assert_eq!(listen("127.0.0.1:8080").unwrap().0, v1::Protocol::Tcp);
        assert!(listen("8080").unwrap_err().contains("expected one as"));
    }
}
