//go:build race

package workloadapi

func init() { raceDetector = true }
