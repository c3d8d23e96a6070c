//! What the controlplane tells of this network's VMs and of what they ask, as lines of the log and as notifications.

use std::collections::HashMap;
use std::convert::Infallible;

use vnet_proto::v1;

use super::notify::{Details, Kind, Notification, Notifier};
use crate::client::Connection;
use crate::cmd::attend::{Attendant, Seen};
use crate::cmd::questions::{Act, Questions};
use crate::output::text::safe;

/// VMs whose state is remembered.
const VMS_MAX: usize = 8192;

/// Follows one dataplane's VMs.
pub(super) struct Watch {
    attendant: Attendant,
    told: Told,
    questions: Questions,
    notifier: Notifier,
}

/// What was told of each VM.
struct Told {
    command: String,
    vms: HashMap<String, Vm>,
}

#[derive(Debug, Default, PartialEq)]
struct Vm {
    mac: String,
    leased: String,
}

impl Watch {
    pub(super) fn start(
        connection: Connection,
        dataplane: String,
        command: String,
        notifier: Notifier,
    ) -> Self {
        Self {
            attendant: Attendant::start(connection, dataplane),
            questions: Questions::new(false, command.clone()),
            told: Told {
                command,
                vms: HashMap::new(),
            },
            notifier,
        }
    }

    /// Tells of what happens, for ever. Cancel safe.
    pub(super) async fn follow(&mut self) -> Infallible {
        loop {
            let acts = match self.attendant.next().await {
                Seen::Began => self.questions.begin_again(),
                Seen::Vm(vm) => {
                    for notification in self.told.vm(&vm) {
                        tracing::info!(vm = vm.name, mac = vm.mac, "{}", sentence(&notification));
                        self.notifier.tell(notification);
                    }
                    Vec::new()
                }
                Seen::Pending(change) => {
                    if change.change() == v1::PendingChange::Added
                        && let Some(request) = &change.request
                        && self.questions.is_news(request)
                    {
                        self.notifier.tell(self.told.pending(request));
                    }
                    self.questions.change(&change)
                }
                Seen::Lost(why) => {
                    tracing::warn!(
                        "no controlplane, so nothing new is let out; trying again ({})",
                        safe(&why)
                    );
                    Vec::new()
                }
            };
            for act in acts {
                if let Act::Say(line) = act {
                    tracing::warn!("{}", line.strip_prefix("vnet: ").unwrap_or(&line));
                }
            }
        }
    }
}

impl Told {
    /// What is new of a VM.
    fn vm(&mut self, vm: &v1::Vm) -> Vec<Notification> {
        let of = |kind| Notification {
            mac_address: vm.mac.clone(),
            vm: vm.name.clone(),
            ..Notification::new(kind)
        };
        if vm.state() != v1::VmState::Attached {
            let known = self.vms.remove(&vm.name).unwrap_or_default();
            if known.mac.is_empty() {
                return Vec::new();
            }
            let gone = |kind| Notification {
                mac_address: known.mac.clone(),
                ..of(kind)
            };
            let mut news = Vec::new();
            if !vm.link_error.is_empty() {
                news.push(Notification {
                    error: vm.link_error.clone(),
                    ..gone(Kind::HypervisorError)
                });
            }
            news.push(gone(Kind::ConnectionClosed));
            return news;
        }
        if vm.mac.is_empty() || (!self.vms.contains_key(&vm.name) && self.vms.len() >= VMS_MAX) {
            return Vec::new();
        }
        let known = self.vms.entry(vm.name.clone()).or_default();
        let mut news = Vec::new();
        if known.mac.is_empty() {
            known.mac.clone_from(&vm.mac);
            news.push(of(Kind::ConnectionEstablished));
        }
        if vm.leased_address != known.leased {
            known.leased.clone_from(&vm.leased_address);
            if !vm.leased_address.is_empty() {
                news.push(Notification {
                    ip_address: vm.leased_address.clone(),
                    ..of(Kind::DhcpAssigned)
                });
            }
        }
        news
    }

    fn pending(&self, request: &v1::PendingRequest) -> Notification {
        let details = Details {
            protocol: String::new(),
            ip: String::new(),
            port: None,
            name: request.names.first().cloned().unwrap_or_default(),
            id: request.id.clone(),
            answer: format!("{} approve {}", self.command, request.id),
        };
        Notification {
            vm: request.vm.clone(),
            details: Some(asked(request, details)),
            ..Notification::new(Kind::NetworkPolicyPending)
        }
    }
}

/// What a request asks for, in the fields of the draft.
fn asked(request: &v1::PendingRequest, details: Details) -> Details {
    use v1::target::Kind as Target;
    match request.target.as_ref().and_then(|target| target.kind.as_ref()) {
        Some(Target::Address(to)) => Details {
            protocol: protocol(to.protocol()).to_owned(),
            ip: to.prefix.split('/').next().unwrap_or_default().to_owned(),
            port: to.ports.as_ref().map(|range| range.first),
            ..details
        },
        Some(Target::Name(name)) => Details {
            protocol: "dns".to_owned(),
            name: name.name.clone(),
            ..details
        },
        None => details,
    }
}

fn protocol(protocol: v1::Protocol) -> &'static str {
    match protocol {
        v1::Protocol::Tcp => "tcp",
        v1::Protocol::Udp => "udp",
        v1::Protocol::Icmp | v1::Protocol::Icmpv6 => "icmp",
        v1::Protocol::Unspecified => "",
    }
}

fn sentence(of: &Notification) -> String {
    match of.kind {
        Kind::ConnectionEstablished => "a VM is there".to_owned(),
        Kind::ConnectionClosed => "a VM is gone".to_owned(),
        Kind::DhcpAssigned => format!("a VM was given {} by DHCP", of.ip_address),
        Kind::HypervisorError => of.error.clone(),
        Kind::Ready | Kind::NetworkPolicyPending => String::new(),
    }
}
