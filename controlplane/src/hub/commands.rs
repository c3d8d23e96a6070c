//! Commands to dataplanes, each acknowledged: forwards and zones. And what dataplanes know of names.

use std::collections::HashSet;
use std::time::Duration;

use tokio::sync::oneshot;
use vnet_proto::v1;
use vnet_proto::v1::command::Command;

use super::events::about;
use super::{Hub, State, Which};
use crate::clock::Now;
use crate::convert;
use crate::fleet::{DataplaneNo, Outstanding, Vm};
use crate::refusal::Refusal;

/// How long a command waits for its acknowledgement.
const COMMAND_WAIT: Duration = Duration::from_secs(5);

impl Hub {
    /// Tells a network's dataplane to do something, and waits until it did. Without a name, the only
    /// network's. What is sent is made of the network's name.
    ///
    /// # Errors
    /// [`Refusal`] if there is none, or it refuses or does not answer.
    pub async fn command(
        &self,
        network: &str,
        make: impl FnOnce(&str) -> Command,
    ) -> Result<v1::Ack, Refusal> {
        let wait = self.read(|state, _| {
            let number = state.fleet.dataplane_of_network(network)?;
            state.send_command(number, None, make)
        })?;
        Self::acknowledged(wait).await
    }

    /// As [`Self::command`], to one dataplane.
    ///
    /// # Errors
    /// [`Refusal`] if it is lost, refuses or does not answer.
    pub(super) async fn command_to(&self, number: DataplaneNo, command: Command) -> Result<v1::Ack, Refusal> {
        Self::acknowledged(self.read(|state, _| state.send_command(number, None, |_| command))?).await
    }

    /// Waits for what a dataplane says to a command.
    pub(super) async fn acknowledged(
        wait: oneshot::Receiver<Result<v1::Ack, Refusal>>,
    ) -> Result<v1::Ack, Refusal> {
        match tokio::time::timeout(COMMAND_WAIT, wait).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Refusal::Unavailable(
                "the dataplane was lost before it answered".to_owned(),
            )),
            Err(_) => Err(Refusal::Unavailable("the dataplane does not answer".to_owned())),
        }
    }

    /// The forwards of a network, or of all.
    ///
    /// # Errors
    /// [`Refusal::Unavailable`]: the network is not connected.
    pub fn forwards(&self, network: &str) -> Result<Vec<v1::Forward>, Refusal> {
        self.read(|state, _| {
            let mut forwards: Vec<v1::Forward> = state
                .networks(network)?
                .flat_map(|d| {
                    d.forwards.iter().map(|f| v1::Forward {
                        network: d.network.clone(),
                        ..f.clone()
                    })
                })
                .collect();
            forwards.sort_by(|a, b| {
                (&a.network, a.protocol, &a.listen).cmp(&(&b.network, b.protocol, &b.listen))
            });
            Ok(forwards)
        })
    }

    /// The zones of a network, or of all, in order of precedence.
    ///
    /// # Errors
    /// [`Refusal::Unavailable`]: the network is not connected.
    pub fn zones(&self, network: &str) -> Result<Vec<v1::Zone>, Refusal> {
        self.read(|state, _| {
            let zones = state
                .networks(network)?
                .flat_map(|d| {
                    d.zones.iter().map(|z| v1::Zone {
                        network: d.network.clone(),
                        ..z.clone()
                    })
                })
                .collect();
            Ok(zones)
        })
    }

    /// What VMs' lookups taught, by VM and name.
    pub fn bindings(&self, which: Which<'_>) -> Vec<v1::Binding> {
        self.read(|state, _| {
            let of_vm = |vm: &Vm| -> Vec<v1::Binding> {
                let message =
                    |(name, binding): (&vnet_proto::model::Name, &crate::fleet::Binding)| v1::Binding {
                        vm: vm.view.name.clone(),
                        name: name.to_string(),
                        addresses: binding.addresses.iter().map(ToString::to_string).collect(),
                        expires_at: convert::timestamp(binding.expires_at),
                    };
                vm.bindings.iter().map(message).collect()
            };
            state.selected(which).flat_map(of_vm).collect()
        })
    }

    /// Denied lookups, newest first.
    pub fn denied(&self, which: Which<'_>) -> Vec<v1::DeniedLookup> {
        self.read(|state, _| {
            let mut all: Vec<_> = state
                .selected(which)
                .flat_map(|vm| {
                    vm.denied
                        .iter()
                        .map(move |((name, kind), denied)| (vm, name, *kind, denied))
                })
                .collect();
            all.sort_by_key(|(_, _, _, denied)| std::cmp::Reverse(denied.last_at));
            all.into_iter()
                .map(|(vm, name, kind, denied)| v1::DeniedLookup {
                    vm: vm.view.name.clone(),
                    name: name.to_string(),
                    query_type: convert::record_type(kind),
                    count: denied.count,
                    last_at: convert::timestamp(denied.last_at),
                    reason: Some((&denied.reason).into()),
                })
                .collect()
        })
    }
}

impl State {
    /// The dataplanes of a network, or of all. One that is away is not one that has nothing.
    fn networks(&self, network: &str) -> Result<impl Iterator<Item = &crate::fleet::Dataplane>, Refusal> {
        let mut fitting = self
            .fleet
            .dataplanes
            .values()
            .filter(move |d| d.link.is_some() && (network.is_empty() || d.network == network))
            .peekable();
        if fitting.peek().is_none() && !network.is_empty() {
            return Err(Refusal::Unavailable(format!(
                "no connected dataplane has a network {network:?}; if it was only cut off, it is back in a moment"
            )));
        }
        Ok(fitting)
    }

    pub(super) fn selected<'a>(&'a self, which: Which<'a>) -> impl Iterator<Item = &'a Vm> {
        self.fleet
            .vms
            .values()
            .filter(move |vm| which.has(&self.fleet, &vm.view.name, &vm.view.labels))
    }

    pub(super) fn send_command(
        &mut self,
        number: DataplaneNo,
        change: Option<u64>,
        make: impl FnOnce(&str) -> Command,
    ) -> Result<oneshot::Receiver<Result<v1::Ack, Refusal>>, Refusal> {
        let lost = || Refusal::Unavailable("the dataplane is lost".to_owned());
        let dataplane = self.fleet.dataplanes.get_mut(&number).ok_or_else(lost)?;
        let command = make(&dataplane.network);
        let id = dataplane.next_command();
        let message = v1::Command {
            command_id: id.0,
            command: Some(command.clone()),
        };
        if !dataplane.send(v1::session_response::Message::Command(message)) {
            return Err(lost());
        }
        let (reply, wait) = oneshot::channel();
        dataplane.outstanding.insert(
            id,
            Outstanding::Command {
                command,
                reply,
                change,
            },
        );
        self.wait_for_command(change, number);
        Ok(wait)
    }

    /// A dataplane did, or refused, a command.
    pub(super) fn command_done(
        &mut self,
        now: Now,
        number: DataplaneNo,
        command: Command,
        reply: oneshot::Sender<Result<v1::Ack, Refusal>>,
        ack: v1::Ack,
    ) {
        let answer = match &ack.error {
            Some(error) => Err(error.clone().into()),
            None => {
                self.command_took_effect(now, number, command, &ack);
                Ok(ack)
            }
        };
        // A client that went away does not undo what was done.
        let _ = reply.send(answer);
    }

    fn command_took_effect(&mut self, now: Now, number: DataplaneNo, command: Command, ack: &v1::Ack) {
        let Some(dataplane) = self.fleet.dataplanes.get_mut(&number) else {
            return;
        };
        let is = |a: &v1::Forward, b: &v1::Forward| a.protocol == b.protocol && a.listen == b.listen;
        let text = match command {
            Command::Expose(asked) => {
                let forward = ack.forward.clone().unwrap_or(asked);
                let text = format!("{} leads to {}", forward.listen, forward.target);
                dataplane.forwards.retain(|f| !is(f, &forward));
                dataplane.forwards.push(forward.clone());
                self.forward_opened(now, number, &forward);
                text
            }
            Command::ExposeRange(_) => {
                dataplane.forwards.retain(not_among(&ack.forwards));
                dataplane.forwards.extend(ack.forwards.iter().cloned());
                let (listen, target) = (
                    span(&ack.forwards, |f| &f.listen),
                    span(&ack.forwards, |f| &f.target),
                );
                format!("{listen} leads to {target}")
            }
            Command::UnexposeRange(_) => {
                self.metrics.flows_cut.add(ack.cut_flows);
                dataplane.forwards.retain(not_among(&ack.forwards));
                format!("{} is closed", span(&ack.forwards, |f| &f.listen))
            }
            Command::Unexpose(forward) => {
                self.metrics.flows_cut.add(ack.cut_flows);
                dataplane.forwards.retain(|f| !is(f, &forward));
                format!("{} is closed", forward.listen)
            }
            Command::SetZone(asked) | Command::MergeZone(asked) | Command::RemoveRecords(asked) => {
                let zone = ack.zone.clone().unwrap_or(asked);
                match dataplane.zones.iter_mut().find(|z| z.name == zone.name) {
                    Some(old) => *old = zone,
                    None => dataplane.zones.push(zone),
                }
                return;
            }
            Command::DeleteZone(zone) => {
                dataplane.zones.retain(|z| z.name != zone.name);
                return;
            }
            Command::StartCapture(_) | Command::StopCapture(_) | Command::ReportVerdicts(_) => return,
        };
        let network = self.fleet.dataplanes.get(&number).map(|d| d.network.clone());
        let network = network.unwrap_or_default();
        let event = v1::Event {
            subject: network.clone(),
            network,
            ..about(v1::EventKind::ForwardChanged, "", text)
        };
        self.event(now, event);
    }
}

/// Whether a forward is none of these, by what names one.
fn not_among(forwards: &[v1::Forward]) -> impl FnMut(&v1::Forward) -> bool {
    let names: HashSet<(i32, &str)> = forwards.iter().map(|f| (f.protocol, f.listen.as_str())).collect();
    move |f| !names.contains(&(f.protocol, f.listen.as_str()))
}

/// The places of a range in one text, as `127.0.0.1:8000-8010`.
fn span(forwards: &[v1::Forward], place: impl Fn(&v1::Forward) -> &String) -> String {
    let port = |f: &v1::Forward| place(f).rsplit(':').next().map(str::to_owned);
    match (forwards.first(), forwards.last().and_then(port)) {
        (Some(first), Some(last)) => format!("{}-{last}", place(first)),
        _ => String::new(),
    }
}
