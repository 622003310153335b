package workloadapi

import (
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/spiffed/spiffed/internal/outlet"
	"github.com/spiffed/spiffed/internal/registry"
)

// maxMessages is how many different ones of a kind are remembered: most streams
// of a host are those of a few workloads.
const maxMessages = 16

// messages remembers what was made of updates last, so that a thousand streams
// with the same identities share one message, and a rotation makes it once. A
// message is never changed once made.
type messages struct {
	build func(*registry.Update) (proto.Message, error)

	mu   sync.Mutex // guards made; held while one is built, since others want it as well
	made []message  // the latest last
}

type message struct {
	update *registry.Update
	msg    proto.Message
}

// of returns the message for an update.
func (m *messages) of(u *registry.Update) (proto.Message, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := len(m.made) - 1; i >= 0; i-- {
		if outlet.Same(m.made[i].update, u) {
			return m.made[i].msg, nil
		}
	}
	msg, err := m.build(u)
	if err != nil {
		return nil, err
	}
	if len(m.made) == maxMessages {
		m.made = append(m.made[:0], m.made[1:]...)
	}
	m.made = append(m.made, message{u, msg})
	return msg, nil
}
