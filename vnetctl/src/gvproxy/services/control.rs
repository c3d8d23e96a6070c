//! The controlplane as this network's services see it: one connection, that is kept, and lists that hold what is of
//! this network.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::Mutex;
use vnet_proto::v1;

use super::answer::{Answer, is_away};
use crate::client::{Client, Connection, PAGE_SIZE, unary};
use crate::failure::Failure;

/// Pages of one list that are read.
const PAGES_MAX: usize = 100;

/// A question that is asked anew each time.
pub type Question = Arc<dyn Fn() -> BoxFuture<'static, Result<bool, Failure>> + Send + Sync>;

/// Whether a policy or a mode is in force for any VM of a network: `given` says that this network's VMs were given one
/// at their start, which holds before the first of them is there; what the controlplane has for one counts as well.
pub fn policy_in_force(connection: Connection, network: String, given: bool) -> Question {
    let control = Arc::new(Control::new(connection, network));
    Arc::new(move || {
        let control = Arc::clone(&control);
        Box::pin(async move {
            if given {
                return Ok(true);
            }
            let vms = control.list_vms().await.map_err(CallError::into_failure)?;
            if vms.is_empty() {
                // One that comes must not find open what was opened before it was there.
                return control.is_any_in_force().await.map_err(CallError::into_failure);
            }
            Ok(vms.iter().any(|vm| vm.mode() != v1::Mode::Open))
        })
    })
}

/// Why a call came to nothing.
pub(super) enum CallError {
    /// There is no connection, or no whole answer.
    Absent(Failure),
    /// The controlplane refused, or went away.
    Refused(Box<tonic::Status>),
}

impl CallError {
    fn into_failure(self) -> Failure {
        match self {
            Self::Absent(failure) => failure,
            Self::Refused(status) => (*status).into(),
        }
    }
}

impl From<CallError> for Answer {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Absent(failure) => failure.into(),
            CallError::Refused(status) => (*status).into(),
        }
    }
}

/// The controlplane, and the network that it is asked about.
pub(super) struct Control {
    connection: Connection,
    network: String,
    /// The connection, while it works.
    client: Mutex<Option<Client>>,
}

impl Control {
    pub(super) fn new(connection: Connection, network: String) -> Self {
        Self {
            connection,
            network,
            client: Mutex::new(None),
        }
    }

    /// The network's name.
    pub(super) fn network(&self) -> &str {
        &self.network
    }

    /// The kept connection, or a new one.
    pub(super) async fn client(&self) -> Result<Client, CallError> {
        let mut kept = self.client.lock().await;
        if let Some(client) = &*kept {
            return Ok(client.clone());
        }
        let client = self.connection.open().await.map_err(CallError::Absent)?;
        *kept = Some(client.clone());
        Ok(client)
    }

    /// Makes one call.
    ///
    /// # Errors
    /// What the controlplane refuses, or that there is none. The next call looks for it anew then.
    pub(super) async fn call<T, F>(&self, make: impl FnOnce(Client) -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let client = self.client().await?;
        match make(client).await {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => {
                if is_away(&status) {
                    *self.client.lock().await = None;
                }
                Err(CallError::Refused(Box::new(status)))
            }
        }
    }

    /// Reads the pages of a list.
    ///
    /// # Errors
    /// As of a call; a list that is longer than this reads.
    pub(super) async fn pages<T, F>(
        &self,
        mut page: impl FnMut(Client, String) -> F,
    ) -> Result<Vec<T>, CallError>
    where
        F: Future<Output = Result<tonic::Response<(Vec<T>, String)>, tonic::Status>>,
    {
        let mut all = Vec::new();
        let mut token = String::new();
        for _ in 0..PAGES_MAX {
            let (items, next) = self.call(|client| page(client, token)).await?;
            all.extend(items);
            if next.is_empty() {
                return Ok(all);
            }
            token = next;
        }
        // A part of it would pass for the whole.
        let text = format!("the controlplane has more than {PAGES_MAX} pages of a list");
        Err(CallError::Absent(Failure::Failed(text)))
    }

    /// The VMs of the network, by name.
    pub(super) async fn list_vms(&self) -> Result<Vec<v1::Vm>, CallError> {
        self.pages(|client, page_token| async move {
            let request = v1::ListVmsRequest {
                page_size: PAGE_SIZE,
                page_token,
                network: self.network.clone(),
                ..Default::default()
            };
            let answer = client.vms().list_vms(unary(request)).await?;
            Ok(answer.map(|list| (list.vms, list.next_page_token)))
        })
        .await
    }

    /// Whether a VM that is not there yet may come to be under a policy or a mode.
    async fn is_any_in_force(&self) -> Result<bool, CallError> {
        let request = v1::GetPolicyRequest::default();
        let answer = self
            .call(|client| async move { client.policy().get_policy(unary(request)).await })
            .await?;
        Ok(answer.any_in_force)
    }

    /// The forwards of the network.
    pub(super) async fn list_forwards(&self) -> Result<Vec<v1::Forward>, CallError> {
        let request = v1::ListForwardsRequest {
            network: self.network.clone(),
        };
        let list = self
            .call(|client| async move { client.forwards().list_forwards(unary(request)).await })
            .await?;
        Ok(list.forwards)
    }

    /// What is asked for VMs of the network, oldest first.
    pub(super) async fn list_pending(&self) -> Result<Vec<v1::PendingRequest>, CallError> {
        self.pages(|client, page_token| async move {
            let request = v1::ListPendingRequest {
                page_size: PAGE_SIZE,
                page_token,
                network: self.network.clone(),
                ..Default::default()
            };
            let answer = client.pending().list_pending(unary(request)).await?;
            Ok(answer.map(|list| (list.requests, list.next_page_token)))
        })
        .await
    }

    /// The live flows of VMs of the network, newest first.
    pub(super) async fn list_flows(&self) -> Result<Vec<v1::Flow>, CallError> {
        self.pages(|client, page_token| async move {
            let request = v1::ListFlowsRequest {
                page_size: PAGE_SIZE,
                page_token,
                network: self.network.clone(),
                ..Default::default()
            };
            let answer = client.flows().list_flows(unary(request)).await?;
            Ok(answer.map(|list| (list.flows, list.next_page_token)))
        })
        .await
    }

    /// The grants that hold for a VM of the network, newest first.
    pub(super) async fn list_grants(&self) -> Result<Vec<v1::Grant>, CallError> {
        self.pages(|client, page_token| async move {
            let request = v1::ListGrantsRequest {
                page_size: PAGE_SIZE,
                page_token,
                network: self.network.clone(),
                ..Default::default()
            };
            let answer = client.grants().list_grants(unary(request)).await?;
            Ok(answer.map(|list| (list.grants, list.next_page_token)))
        })
        .await
    }
}
