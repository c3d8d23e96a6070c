//! Many requests answered by one command: those for names that fit a pattern.
//!
//! Each is answered under its own id with the etag of what was listed, so that a yes reaches nothing that
//! came in between. An answer of a wider scope may decide others of them on the way; those count as answered.

use vnet_proto::model::{Name, NamePattern};
use vnet_proto::v1;

use super::pending::open_requests;
use crate::client::{Client, unary};
use crate::failure::Failure;

/// The requests that fit.
#[derive(Debug)]
pub struct Matching {
    pattern: NamePattern,
    requests: Vec<v1::PendingRequest>,
    left_out: usize,
}

impl Matching {
    /// Looks for those of these VMs (unset: of all). `takes` says which may be answered together with others.
    ///
    /// # Errors
    /// What the controlplane refuses; and if there is none.
    pub async fn find(
        client: &Client,
        pattern: NamePattern,
        vms: Option<v1::VmSelector>,
        takes: impl Fn(&v1::PendingRequest) -> bool,
    ) -> Result<Self, Failure> {
        let mut requests = open_requests(client, vms).await?;
        requests.retain(|request| fits(&pattern, request));
        let fitting = requests.len();
        requests.retain(takes);
        if fitting == 0 {
            return Err(Failure::Failed(format!(
                "no pending request is for a name that fits {pattern}; list them with: vnetctl pending list"
            )));
        }
        Ok(Self {
            left_out: fitting - requests.len(),
            pattern,
            requests,
        })
    }

    /// Answers them one by one, and says how many.
    ///
    /// # Errors
    /// The first answer that was refused while its request was still open; those before it stand.
    pub async fn answer(
        self,
        client: &Client,
        done: &str,
        mut act: impl AsyncFnMut(String, String) -> Result<(), Failure>,
    ) -> Result<String, Failure> {
        let (mut answered, mut along, mut gone) = (0, 0, 0);
        for v1::PendingRequest { id, etag, .. } in self.requests {
            let Err(failure) = act(id.clone(), etag).await else {
                answered += 1;
                continue;
            };
            if matches!(failure, Failure::OutputClosed | Failure::Usage(_)) {
                return Err(failure);
            }
            let request = v1::GetPendingRequest { id };
            let now = client.pending().get_pending(unary(request)).await?.into_inner();
            match now.request.unwrap_or_default().state() {
                v1::PendingState::Open => return Err(failure),
                v1::PendingState::Decided => along += 1,
                _ => gone += 1,
            }
        }
        let requests = |n: usize| {
            if n == 1 {
                "1 request".to_owned()
            } else {
                format!("{n} requests")
            }
        };
        let mut said = format!(
            "{done} {} for names that fit {}",
            requests(answered + along),
            self.pattern
        );
        if along > 0 {
            said.push_str(&format!(", {along} of them by the answers to others"));
        }
        if gone > 0 {
            said.push_str(&format!("; {} ended meanwhile", requests(gone)));
        }
        if self.left_out > 0 {
            said.push_str(&format!(
                "; {} left out, under a guard: answer each by its id",
                requests(self.left_out)
            ));
        }
        Ok(said)
    }
}

/// Whether the name that the narrowest answer to a request would be about fits.
fn fits(pattern: &NamePattern, request: &v1::PendingRequest) -> bool {
    let name = request.names.first().and_then(|name| name.parse::<Name>().ok());
    name.is_some_and(|name| pattern.matches(&name))
}
